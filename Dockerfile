# The node without root and without CUDA. Build: docker build -t dicomnode .
# Run:   docker run --stop-timeout 60 -p 11112:11112 -v $PWD/config.yaml:/app/config.yaml:ro -v dicomnode:/data dicomnode
# In config.yaml: node.data_dir: /data. The HTTP port stays inside unless http.bind and http.token say so.
FROM python:3.11-slim AS build
WORKDIR /app
RUN python -m venv /venv
COPY pyproject.toml README.md LICENSE ./
RUN /venv/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
    "$(grep -o '"torch==[^"]*"' pyproject.toml | tr -d '"')"
COPY dicomnode ./dicomnode
RUN /venv/bin/pip install --no-cache-dir .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home dicomnode \
    && install -d -o dicomnode -g dicomnode /data
COPY --from=build /venv /venv
WORKDIR /app
COPY models ./models
COPY config.yaml ./config.yaml
RUN sed -i 's|data_dir: data |data_dir: /data |' config.yaml
USER dicomnode
VOLUME /data
EXPOSE 11112
ENV PYTHONUNBUFFERED=1
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["/venv/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
CMD ["/venv/bin/python", "-m", "dicomnode", "serve", "--config", "config.yaml"]
