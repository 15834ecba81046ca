"""Judging detections: arrays and JSON in, figures out; knows no model."""
