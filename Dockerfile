# The service on CPU, in its embedded form: one process, one data directory.
#   docker build -t matcher-service .
#   docker run --read-only --tmpfs /tmp -v matcher-data:/var/lib/matcher -v matcher-keys:/var/lib/matcher-keys \
#       -v ./tls:/etc/matcher/tls:ro -e MATCHER_SERVER__HOST=0.0.0.0 -p 8080:8080 -p 8081:8081 \
#       -e MATCHER_SERVER__TLS_CERTIFICATE_FILE=/etc/matcher/tls/tls.crt \
#       -e MATCHER_SERVER__TLS_KEY_FILE=/etc/matcher/tls/tls.key matcher-service
# Without MATCHER_SERVER__HOST it listens on the container's loopback only. For a reproducible build pass the base
# by digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY pyproject.toml constraints.txt README.md ./
COPY matcher_service matcher_service
RUN python -m venv /opt/matcher \
    && /opt/matcher/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[cpu]'

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 matcher \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin matcher \
    && install -d -o matcher -g matcher -m 0700 /var/lib/matcher /var/lib/matcher-keys
COPY --from=build /opt/matcher /opt/matcher
COPY ops/image/healthcheck.py /opt/matcher/healthcheck.py
ENV PATH=/opt/matcher/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MATCHER_STORAGE__DATA_DIR=/var/lib/matcher/data \
    MATCHER_STORAGE__KEYS_DIR=/var/lib/matcher-keys/keys
# Two volumes, so that a backup of the data never holds the keys.
VOLUME ["/var/lib/matcher", "/var/lib/matcher-keys"]
EXPOSE 8080 8081
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["python", "/opt/matcher/healthcheck.py"]
ENTRYPOINT ["matcher", "serve"]
