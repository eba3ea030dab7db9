// What every engine is given and gives. Needs nlohmann-json.
#pragma once

#include "picture.hpp"

#include <nlohmann/json.hpp>

struct Inputs {
    std::size_t images, height, width;
    std::vector<std::uint8_t> image;     // [images, height, width, 3], RGB
    std::vector<std::int32_t> im_shape;  // [images, 2]: height and width of what is picture in it
    std::vector<float> scale_factor;     // [images, 2]: by which that was resized, y and x
};

// `about`: the file's metadata "gfldeploy". `shape`: that of its input "image", below 1 where any number will do.
inline Inputs inputs_of(const Picture& picture, const nlohmann::json& about, const std::vector<std::int64_t>& shape) {
    const auto& rule = about.at("preprocess");
    if (rule.at("interp") != 1) throw std::runtime_error("the detector wants another interpolation: change resize()");
    const double target_y = rule.at("target_size")[0], target_x = rule.at("target_size")[1];
    double y = target_y / picture.height, x = target_x / picture.width;
    if (rule.at("keep_ratio") && rule.at("fixed")) x = y = std::min(y, x);
    else if (rule.at("keep_ratio"))
        x = y = std::min(std::min(target_y, target_x) / std::min(picture.height, picture.width),
                         std::max(target_y, target_x) / std::max(picture.height, picture.width));
    const Picture resized = resize(picture, y, x);
    Inputs inputs{std::size_t(std::max(shape[0], std::int64_t(1))), std::size_t(std::max(shape[1], std::int64_t(resized.height))),
                  std::size_t(std::max(shape[2], std::int64_t(resized.width))), {}, {}, {}};
    inputs.image.resize(inputs.images * inputs.height * inputs.width * 3);
    for (std::size_t image = 0; image < inputs.images; ++image) {
        for (int row = 0; row < resized.height; ++row)
            std::copy_n(&resized.rgb[std::size_t(3) * resized.width * row], 3 * resized.width,
                        &inputs.image[(image * inputs.height + row) * inputs.width * 3]);
        inputs.im_shape.insert(inputs.im_shape.end(), {resized.height, resized.width});
        inputs.scale_factor.insert(inputs.scale_factor.end(), {float(y), float(x)});
    }
    return inputs;
}

// The detections of one image: class, score, and x1, y1, x2, y2 in pixels of the picture.
inline void print(const nlohmann::json& about, const float* boxes, const float* scores, const std::int32_t* classes,
                  std::int32_t count, float least_score) {
    for (int i = 0; i < count; ++i)
        if (const float* box = boxes + 4 * i; scores[i] >= least_score)
            std::printf("%s %.4f %.2f %.2f %.2f %.2f\n", about.at("classes")[classes[i]].get<std::string>().c_str(),
                        scores[i], box[0], box[1], box[2], box[3]);
}
