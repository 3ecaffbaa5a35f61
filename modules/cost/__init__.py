"""What a forward costs, from token counts alone: count rules, shapes of backbones, MACs, bytes."""
