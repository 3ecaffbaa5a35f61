"""Labels of any data set: classes, the number of each label, rows of each class."""
