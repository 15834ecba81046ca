"""Faster R-CNN and everything around it; imports resbackbone, never the reverse."""
