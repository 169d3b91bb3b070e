"""Arithmetic that is arranged for speed: functions of tensors, which know of no model."""
