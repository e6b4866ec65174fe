"""The built-in methods, one file each. A file registers its method when it is imported."""
