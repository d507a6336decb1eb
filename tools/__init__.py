"""What builds the book. Not part of the package that readers install."""
