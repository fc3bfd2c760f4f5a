"""The numbers that states are made of, exact or not."""
