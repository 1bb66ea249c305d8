"""What is relied on of torch, a named test for each: a release that changes it breaks that test."""
