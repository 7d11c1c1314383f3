"""What a trained model says of anybody's pictures: `python -m pipeline predict`. No stage depends on it."""
