"""The op inside other libraries' trainers, and under their calling conventions."""
