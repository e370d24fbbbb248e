"""The reference service: a small shop made of nothing but Overdrive's public names."""
