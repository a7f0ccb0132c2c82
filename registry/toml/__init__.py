"""TOML for people: every problem with its line, in the file's own words."""
