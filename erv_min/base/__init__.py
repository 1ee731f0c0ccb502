"""What everything else stands on and no equation needs, from errors and files to kernels. It imports base/ alone."""
