"""What differs between kinds of pipelines, and the policy made of one."""
