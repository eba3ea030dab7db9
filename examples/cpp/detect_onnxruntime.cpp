// detect_onnxruntime BUNDLE/onnx/end_to_end.onnx PICTURE [LEAST_SCORE]: what the file finds there, in ONNX Runtime.
#include "detector.hpp"
#include <onnxruntime_cxx_api.h>

template <typename T>
Ort::Value tensor(std::vector<T>& values, const std::vector<std::size_t>& sizes) {  // reads `values`, copies nothing
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const std::vector<std::int64_t> shape(sizes.begin(), sizes.end());
    return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

int main(int argc, char** argv) try {
    if (argc < 3) throw std::runtime_error("give the file and a picture, and the least score if it is not 0.4");
    const Ort::Env environment;
    Ort::Session session(environment, argv[1], Ort::SessionOptions());
    Ort::AllocatorWithDefaultOptions allocator;
    const auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated("gfldeploy", allocator);
    if (!text) throw std::runtime_error("give end_to_end.onnx of a bundle");
    const auto about = nlohmann::json::parse(text.get());
    const auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    auto [images, height, width, image, im_shape, scale_factor] = inputs_of(read_picture(argv[2]), about, shape);
    const Ort::Value inputs[] = {tensor(image, {images, height, width, 3}), tensor(im_shape, {images, 2}),
                                 tensor(scale_factor, {images, 2})};
    const char* const names[] = {"image", "im_shape", "scale_factor"};
    const char* const results[] = {"boxes", "scores", "classes", "count"};
    const auto found = session.Run(Ort::RunOptions(), names, inputs, 3, results, 4);
    print(about, found[0].GetTensorData<float>(), found[1].GetTensorData<float>(),
          found[2].GetTensorData<std::int32_t>(), *found[3].GetTensorData<std::int32_t>(),
          argc > 3 ? std::stof(argv[3]) : 0.4f);
} catch (const std::exception& error) {
    std::fprintf(stderr, "Error: %s\n", error.what());
    return 1;
}
