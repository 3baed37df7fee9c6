# syntax=docker/dockerfile:1

# --- build: steps that need a compiler or pip -------------------------------------------------
FROM python:3.12-slim AS build

RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/lorakeet
ENV PATH=/opt/lorakeet/bin:$PATH

# torch first, in its own layer: it is most of the image and rarely changes. The default wheel includes CUDA's libraries;
# for a small image without them, build with --target cpu --build-arg TORCH_INDEX=(PyTorch's CPU wheel index).
ARG TORCH_INDEX=
WORKDIR /src
COPY constraints.txt .
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

COPY . .
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} .
WORKDIR /
RUN python -m adapters.kernels.build

# --- cpu: no compiler, no root, no mutable data in the image ----------------------------------------
FROM python:3.12-slim AS cpu

RUN useradd --system --uid 10001 --create-home lorakeet \
 && install --directory --owner=lorakeet /data /cache
COPY --from=build /opt/lorakeet /opt/lorakeet

ENV PATH=/opt/lorakeet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAKEET_HOST=0.0.0.0 \
    LORAKEET_PORT=8000 \
    LORAKEET_DATA_DIR=/data \
    LORAKEET_CACHE_DIR=/cache

USER lorakeet
WORKDIR /home/lorakeet
VOLUME ["/data", "/cache"]
EXPOSE 8000

# Liveness, not readiness: the container must not be killed while its engine is loading or restarting. The first start
# downloads the model before the server listens.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"LORAKEET_PORT\"]}/health', timeout=4)"]

# `docker stop` sends SIGTERM, which drains: allow more time than --drain-seconds (30), as in `docker stop -t 40`.
ENTRYPOINT ["lorakeet"]
CMD ["serve"]

# --- default: also for NVIDIA GPUs ---------------------------------------------------
# A plain Python base image is enough: torch's wheels include CUDA's libraries and Triton's wheel includes ptxas, so nvidia/cuda
# would duplicate them; libcuda.so comes from the host's driver, through the NVIDIA container toolkit.
FROM cpu

# Triton compiles a small C module against Python.h and its own copy of cuda.h when it first uses the GPU. gcc only
# recommends libc6-dev, so it is listed here.
USER root
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER lorakeet

# `compute` is CUDA, `utility` nvidia-smi. Compiled kernels are stored with the other recreatable data.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/cache/triton
