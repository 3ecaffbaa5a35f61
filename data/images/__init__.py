"""Images: transforms, masks, augmentation, splits."""
