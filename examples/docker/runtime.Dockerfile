# Runs and measures bundles on a CPU, with OpenVINO and ONNX Runtime.
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY gfldeploy gfldeploy
RUN python -m venv /gfldeploy \
    && /gfldeploy/bin/pip install --no-cache-dir ".[openvino,onnxruntime]"

FROM python:3.12-slim
COPY --from=build /gfldeploy /gfldeploy
RUN useradd --create-home --uid 1000 user
USER 1000
ENV PATH=/gfldeploy/bin:$PATH
WORKDIR /data
ENTRYPOINT ["gfldeploy"]
