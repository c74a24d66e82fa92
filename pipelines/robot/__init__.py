"""The robot side: a simulated arm, DROID raw episodes both ways, and a recorder of random play."""
