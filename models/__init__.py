"""Reference generators and their data."""
