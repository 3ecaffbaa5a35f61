"""The parts of ``laconic evaluate``."""
