"""What a child is: specs in TOML, read whole, written back in one form."""
