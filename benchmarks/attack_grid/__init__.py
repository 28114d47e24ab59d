"""The attack table: cells of attack, number of sites and defence, and what they say together."""
