"""From requests to text."""
