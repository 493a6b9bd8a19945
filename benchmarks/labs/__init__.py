"""Predictions against measurements on laboratories (`hexgen lab`)."""
