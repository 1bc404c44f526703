"""How good a model is: texts to measure it on, what others reached, and the quality of its samples."""
