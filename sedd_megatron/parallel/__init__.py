"""Process groups, collectives and the CPU backend; knows no model."""
