"""Where the curves of a run go: TensorBoard, CSV files, trackers."""
