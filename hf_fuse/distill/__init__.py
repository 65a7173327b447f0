"""Distillation: teachers of any size, a student that learns from their predictions."""
