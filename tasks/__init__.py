"""The domains of the zoo. Each knows zoo, none knows another."""

DISTRIBUTION = "gatedfwa-zoo"  # zoo.registry tells by it whether another package named `tasks` hides this one
