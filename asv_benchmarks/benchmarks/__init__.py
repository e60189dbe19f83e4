"""The airspeed velocity suite: every public operation beside its floor, whole steps beside SGD, growth and memory."""
