"""What watches a run: the line a step, scalars and pictures for TensorBoard, checkpoints' random state, and the guard against NaN."""
