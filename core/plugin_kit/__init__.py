"""A plugin of one's own: the package that `regraft plugins new` writes, and the run of `regraft plugins check`."""
