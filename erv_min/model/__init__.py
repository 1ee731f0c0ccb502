"""HumanOmni (Eq. 1), part by part, under the released tensor names."""
