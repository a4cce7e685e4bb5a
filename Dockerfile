# The images: `cpu` (the default), `gpu` (the same with the GPU scanner), `triton` and `triton-gpu` (a gallery shard).
#   docker build -t matcher-service .
#   docker build --target gpu -t matcher-service-gpu .
#   docker build --target triton-gpu --build-arg TRITON_IMAGE=... -t matcher-triton-gpu .
#   docker run --read-only --tmpfs /tmp -v matcher-data:/var/lib/matcher -v matcher-keys:/var/lib/matcher-keys \
#       -v ./tls:/etc/matcher/tls:ro -e MATCHER_SERVER__HOST=0.0.0.0 -p 8080:8080 -p 8081:8081 \
#       -e MATCHER_SERVER__TLS_CERTIFICATE_FILE=/etc/matcher/tls/tls.crt \
#       -e MATCHER_SERVER__TLS_KEY_FILE=/etc/matcher/tls/tls.key matcher-service
# Without MATCHER_SERVER__HOST it listens on the container's loopback only. Every wheel is pinned by its hash
# (`make lock`); pin the bases by digest too: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# NVIDIA's Triton server, release 24.11 or newer (Python 3.12), under the address that you take it from.
ARG TRITON_IMAGE=registry.example/tritonserver:24.11-py3

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /build
COPY ops/image/requirements-build.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --disable-pip-version-check --require-hashes --no-deps -r requirements-build.txt
COPY pyproject.toml README.md ./
COPY matcher_service matcher_service
RUN python -m pip wheel --disable-pip-version-check --no-deps --no-index --no-build-isolation -w /wheel .

# The environments have no pip of their own: nothing can be installed where they are used.
FROM ${PYTHON_IMAGE} AS packages-cpu
COPY ops/image/requirements-cpu.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/matcher \
    && python -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --require-hashes --no-deps \
        -r /build/requirements-cpu.txt
COPY --from=wheel /wheel /wheel
RUN python -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --no-index --no-deps /wheel/*.whl
COPY ops/image/healthcheck.py /opt/matcher/

FROM ${PYTHON_IMAGE} AS packages-gpu
COPY ops/image/requirements-gpu.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/matcher \
    && python -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --require-hashes --no-deps \
        -r /build/requirements-gpu.txt
COPY --from=wheel /wheel /wheel
RUN python -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --no-index --no-deps /wheel/*.whl
COPY ops/image/healthcheck.py /opt/matcher/

FROM ${TRITON_IMAGE} AS packages-triton
# hadolint ignore=DL3002
USER 0:0
COPY ops/image/requirements-triton.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/matcher \
    && python3 -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --require-hashes --no-deps \
        -r /build/requirements-triton.txt
COPY --from=wheel /wheel /wheel
RUN python3 -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --no-index --no-deps \
        /wheel/*.whl
COPY ops/image/shard_ready.py /opt/matcher/

FROM ${TRITON_IMAGE} AS packages-triton-gpu
# hadolint ignore=DL3002
USER 0:0
COPY ops/image/requirements-triton-gpu.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/matcher \
    && python3 -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --require-hashes --no-deps \
        -r /build/requirements-triton-gpu.txt
COPY --from=wheel /wheel /wheel
RUN python3 -m pip --python /opt/matcher/bin/python install --disable-pip-version-check --no-index --no-deps \
        /wheel/*.whl
COPY ops/image/shard_ready.py /opt/matcher/

# What both have in common that serve a gallery shard: Triton's server, the model, the account. What it is told is in MATCHER_SHARD_* (docs/SHARDS.md). Numbers as in the
# service's image, so that both may read the keys.
FROM ${TRITON_IMAGE} AS shard
# hadolint ignore=DL3002
USER 0:0
RUN groupadd --gid 10001 matcher \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin matcher \
    && install -d -o matcher -g matcher -m 0700 /var/lib/matcher-shard /var/lib/matcher-keys
COPY triton_models/gallery_shard /models/gallery_shard
# The model's process finds its interpreter, and so its numpy, by these.
ENV VIRTUAL_ENV=/opt/matcher \
    PATH=/opt/matcher/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MATCHER_SHARD_DATA_DIR=/var/lib/matcher-shard/data \
    MATCHER_SHARD_KEYS_DIR=/var/lib/matcher-keys/keys
VOLUME ["/var/lib/matcher-shard", "/var/lib/matcher-keys"]
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# Up to date, with all of its partitions; a supervisor restarts by /v2/health/ready instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python3", "/opt/matcher/shard_ready.py"]
ENTRYPOINT ["tritonserver", "--model-repository=/models", "--model-control-mode=none", "--disable-auto-complete-config", "--exit-timeout-secs=20"]

FROM shard AS triton
COPY --from=packages-triton /opt/matcher /opt/matcher
USER 10001:10001

# The Triton language (not the Triton server) compiles its kernel where it runs, and the compiler's way to the driver is
# a small C program: hence gcc.
FROM shard AS triton-gpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=packages-triton-gpu /opt/matcher /opt/matcher
ENV TRITON_CACHE_DIR=/tmp/triton MATCHER_SHARD_SCANNER=gpu
USER 10001:10001

# What the service's two images have in common.
FROM ${PYTHON_IMAGE} AS service
RUN groupadd --gid 10001 matcher \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin matcher \
    && install -d -o matcher -g matcher -m 0700 /var/lib/matcher /var/lib/matcher-keys
ENV PATH=/opt/matcher/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MATCHER_STORAGE__DATA_DIR=/var/lib/matcher/data \
    MATCHER_STORAGE__KEYS_DIR=/var/lib/matcher-keys/keys
# Two volumes, so that a backup of the data never holds the keys.
VOLUME ["/var/lib/matcher", "/var/lib/matcher-keys"]
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["python", "/opt/matcher/healthcheck.py"]
ENTRYPOINT ["matcher", "serve"]

FROM service AS gpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=packages-gpu /opt/matcher /opt/matcher
ENV TRITON_CACHE_DIR=/tmp/triton \
    MATCHER_INDEX__SCANNER=gpu \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM service AS cpu
COPY --from=packages-cpu /opt/matcher /opt/matcher
USER 10001:10001
