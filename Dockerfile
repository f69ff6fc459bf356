# lowbit in a container.
#
#   docker build --target cpu  -t lowbit:0.1.0-cpu .
#   docker build --target cuda -t lowbit:0.1.0-cuda .
#
# The CPU image serves GGUF files through llama.cpp. The CUDA image adds vLLM, which brings the CUDA build of torch that
# it wants; the driver comes from the host (NVIDIA's container toolkit).

FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    LOWBIT_CACHE=/var/cache/lowbit HF_HOME=/var/cache/lowbit/hub NUMBA_CACHE_DIR=/var/cache/lowbit/numba \
    MPLCONFIGDIR=/tmp/matplotlib
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 lowbit \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/lowbit --no-create-home lowbit \
    && mkdir -p /var/cache/lowbit /models /etc/lowbit \
    && chown lowbit:lowbit /var/cache/lowbit
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --extra-index-url ${TORCH_INDEX} -c constraints.txt '.[serve,backup]'
USER 10001:10001
WORKDIR /var/cache/lowbit
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --retries=6 --start-period=600s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["lowbit"]
CMD ["serve", "/etc/lowbit/serve.yaml", "--log"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# vLLM compiles kernels when it first runs
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install '.[serve,backup]' 'vllm>=0.32'
USER 10001:10001
WORKDIR /var/cache/lowbit
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --retries=6 --start-period=600s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["lowbit"]
CMD ["serve", "/etc/lowbit/serve.yaml", "--log"]
