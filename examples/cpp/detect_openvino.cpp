// Detect objects with the file of a bundle that deploys by itself, in OpenVINO:
// detect_openvino BUNDLE/onnx/end_to_end.onnx PICTURE [LEAST_SCORE]
#include "detector.hpp"

#include <iostream>
#include <openvino/openvino.hpp>

int main(int argc, char** argv) try {
    if (argc < 3) throw std::invalid_argument("give the file and a picture, and the least score if not 0.4");
    ov::Core core;
    const auto model = core.read_model(argv[1]);
    const auto about = nlohmann::json::parse(model->get_rt_info<std::string>("framework", "gfldeploy"));
    std::vector<std::int64_t> shape;
    for (const auto& side : model->input("image").get_partial_shape()) shape.push_back(side.get_max_length());
    Inputs inputs = inputs_of(read_picture(argv[2]), about, shape);
    const std::size_t images = inputs.images;

    // Without this, OpenVINO takes BF16 where the CPU has it, and detections differ.
    auto network = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = network.create_infer_request();
    request.set_tensor("image", {ov::element::u8, {images, inputs.height, inputs.width, 3}, inputs.image.data()});
    request.set_tensor("im_shape", {ov::element::i32, {images, 2}, inputs.im_shape.data()});
    request.set_tensor("scale_factor", {ov::element::f32, {images, 2}, inputs.scale_factor.data()});
    request.infer();
    print(about, request.get_tensor("boxes").data<float>(), request.get_tensor("scores").data<float>(),
          request.get_tensor("classes").data<std::int32_t>(), *request.get_tensor("count").data<std::int32_t>(),
          argc > 3 ? std::stof(argv[3]) : 0.4f);
} catch (const std::exception& error) {
    std::cerr << "Error: " << error.what() << '\n';
    return 1;
}
