"""HumanOmni (Eq. 1), part by part: each file is one published architecture under its released tensor names."""
