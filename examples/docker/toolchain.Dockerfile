# Exports and quantises as well: the runtime's engines, Paddle, PaddleDetection and PaddleSlim.
# Not the slim image: some of PaddleDetection's packages want a compiler, and Paddle its OpenMP library.
FROM python:3.12
RUN useradd --create-home --uid 1000 user \
    && pip install --no-cache-dir "uv>=0.9,<1"
WORKDIR /gfldeploy
COPY pyproject.toml README.md LICENSE ./
COPY gfldeploy gfldeploy
COPY configs configs
RUN uv sync --no-cache --no-dev --extra onnxruntime --extra openvino --extra paddle --extra export --extra quant
USER 1000
ENV PATH=/gfldeploy/.venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["gfldeploy"]
