"""The public face of regraft."""
