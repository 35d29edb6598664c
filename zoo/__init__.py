"""GatedFWA zoo: one backbone of linear-time token mixers, four autoregressive domains."""
