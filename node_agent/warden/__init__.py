"""The processes outside the agent: the warden that holds every child, and what launcher and warden share."""
