"""Tests of atma.launching, and of trainings that a cluster runs."""
