"""What a trained model can be written as: one class a file, found by the file's name."""
