"""Kubernetes: a job file as KubeRay manifests, and manifests checked without a cluster."""
