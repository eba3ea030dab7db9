// detect_openvino BUNDLE/onnx/end_to_end.onnx PICTURE [LEAST_SCORE]: what the file finds there, in OpenVINO.
#include "detector.hpp"
#include <openvino/openvino.hpp>

int main(int argc, char** argv) try {
    if (argc < 3) throw std::runtime_error("give the file and a picture, and the least score if it is not 0.4");
    ov::Core core;
    const auto model = core.read_model(argv[1]);
    if (!model->has_rt_info("framework", "gfldeploy")) throw std::runtime_error("give end_to_end.onnx of a bundle");
    const auto about = nlohmann::json::parse(model->get_rt_info<std::string>("framework", "gfldeploy"));
    std::vector<std::int64_t> shape;
    for (const auto& side : model->input("image").get_partial_shape()) shape.push_back(side.get_max_length());
    auto [images, height, width, image, im_shape, scale_factor] = inputs_of(read_picture(argv[2]), about, shape);
    // OpenVINO takes BF16 where the CPU has it, unless told not to, and detections differ.
    auto network = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = network.create_infer_request();
    request.set_tensor("image", {ov::element::u8, {images, height, width, 3}, image.data()});
    request.set_tensor("im_shape", {ov::element::i32, {images, 2}, im_shape.data()});
    request.set_tensor("scale_factor", {ov::element::f32, {images, 2}, scale_factor.data()});
    request.infer();
    print(about, request.get_tensor("boxes").data<float>(), request.get_tensor("scores").data<float>(),
          request.get_tensor("classes").data<std::int32_t>(), *request.get_tensor("count").data<std::int32_t>(),
          argc > 3 ? std::stof(argv[3]) : 0.4f);
} catch (const std::exception& error) {
    std::fprintf(stderr, "Error: %s\n", error.what());
    return 1;
}
