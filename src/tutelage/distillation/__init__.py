"""Distillation of the student: the teacher's outputs, the targets made from them, the objectives and the loop."""
