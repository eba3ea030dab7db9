// All but the engine: from a JPEG or PNG file to the inputs of onnx/end_to_end.onnx, and what it gives as text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>
#include <nlohmann/json.hpp>
#include <png.h>
#include <turbojpeg.h>

using Bytes = std::vector<std::uint8_t>;
struct Picture {
    int height, width;
    Bytes rgb;  // row by row
    Picture(int h, int w) : height(h), width(w), rgb(std::size_t(3) * h * w) {}
    const std::uint8_t* row(int y) const { return &rgb[std::size_t(3) * width * y]; }
};

inline Picture decode_jpeg(const Bytes& file) {  // not turned as its EXIF data may say
    const std::unique_ptr<void, int (*)(tjhandle)> jpeg(tjInitDecompress(), tjDestroy);
    const auto check = [&](int status) { if (status) throw std::runtime_error(tjGetErrorStr2(jpeg.get())); };
    int width, height, subsampling, colours;
    check(tjDecompressHeader3(jpeg.get(), file.data(), file.size(), &width, &height, &subsampling, &colours));
    Picture picture(height, width);
    auto* to = picture.rgb.data();
    check(tjDecompress2(jpeg.get(), file.data(), file.size(), to, width, 0, height, TJPF_RGB, TJFLAG_ACCURATEDCT));
    return picture;
}

inline Picture decode_png(const Bytes& file) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    const auto check = [&](int done) { if (!done) throw std::runtime_error(png.message); };
    check(png_image_begin_read_from_memory(&png, file.data(), file.size()));
    png.format = PNG_FORMAT_RGBA;            // to RGB, libpng would blend what is transparent with a background
    png.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;  // otherwise it would change the brightness of 16-bit files
    Bytes rgba(PNG_IMAGE_SIZE(png));
    check(png_image_finish_read(&png, nullptr, rgba.data(), 0, nullptr));
    Picture picture(png.height, png.width);
    for (std::size_t i = 0; i < picture.rgb.size(); ++i) picture.rgb[i] = rgba[i / 3 * 4 + i % 3];
    return picture;
}

inline Picture read_picture(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    const Bytes file{std::istreambuf_iterator<char>(stream), {}};
    if (file.empty()) throw std::runtime_error(path + " is empty or cannot be read");
    return file[0] == 0xFF ? decode_jpeg(file) : decode_png(file);
}

// Of a resized pixel: the two of the original that it lies between, and their weights in 2048ths.
struct Place { int low, high, low_weight, high_weight; };
inline std::vector<Place> places(int resized, int original, double factor) {
    std::vector<Place> result;
    for (int i = 0; i < resized; ++i) {
        const float at = float((i + 0.5) * (1 / factor) - 0.5), low = std::floor(at), share = at - low;
        result.push_back({std::clamp(int(low), 0, original - 1), std::clamp(int(low) + 1, 0, original - 1),
                          int(std::lrint((1 - share) * 2048)), int(std::lrint(share * 2048))});
    }
    return result;
}

// Linear interpolation in the integers of OpenCV's INTER_LINEAR, with which detectors are trained: the same pixels.
inline Picture resize(const Picture& picture, double factor_y, double factor_x) {
    Picture resized(int(std::lrint(picture.height * factor_y)), int(std::lrint(picture.width * factor_x)));
    const auto columns = places(resized.width, picture.width, factor_x);
    auto value = resized.rgb.begin();
    for (const Place& y : places(resized.height, picture.height, factor_y))
        for (const Place& x : columns)
            for (int c = 0; c < 3; ++c) {
                const auto across = [&](const std::uint8_t* row) {
                    return (x.low_weight * row[3 * x.low + c] + x.high_weight * row[3 * x.high + c]) >> 4;
                };
                const int above = across(picture.row(y.low)), below = across(picture.row(y.high));
                *value++ = ((y.low_weight * above >> 16) + (y.high_weight * below >> 16) + 2) >> 2;
            }
    return resized;
}

struct Inputs {
    std::size_t images, height, width;
    Bytes image;                         // [images, height, width, 3], RGB
    std::vector<std::int32_t> im_shape;  // [images, 2]: height and width of what is picture in it
    std::vector<float> scale_factor;     // [images, 2]: by which that was resized, y and x
};

// `about`: the file's metadata "gfldeploy". `shape`: that of its input "image", -1 where any number will do.
inline Inputs inputs_of(const Picture& picture, const nlohmann::json& about, const std::vector<std::int64_t>& shape) {
    const auto& rule = about.at("preprocess");
    if (rule.at("interp") != 1) throw std::runtime_error("the detector wants another interpolation: change resize()");
    const double target_y = rule.at("target_size").at(0), target_x = rule.at("target_size").at(1);
    double factor_y = target_y / picture.height, factor_x = target_x / picture.width;
    const double shorter = std::min(target_y, target_x) / std::min(picture.height, picture.width);
    const double longer = std::max(target_y, target_x) / std::max(picture.height, picture.width);
    if (rule.at("keep_ratio"))
        factor_x = factor_y = rule.at("fixed") ? std::min(factor_y, factor_x) : std::min(shorter, longer);
    const Picture resized = resize(picture, factor_y, factor_x);
    const auto at_least = [&](int axis, int size) { return std::size_t(std::max<std::int64_t>(shape.at(axis), size)); };
    Inputs inputs{at_least(0, 1), at_least(1, resized.height), at_least(2, resized.width), {}, {}, {}};
    inputs.image.resize(3 * inputs.images * inputs.height * inputs.width);
    for (std::size_t i = 0; i < inputs.images; ++i) {  // more than one where the file takes no other number
        for (int y = 0; y < resized.height; ++y)
            std::copy_n(resized.row(y), 3 * resized.width, &inputs.image[3 * inputs.width * (inputs.height * i + y)]);
        inputs.im_shape.insert(inputs.im_shape.end(), {resized.height, resized.width});
        inputs.scale_factor.insert(inputs.scale_factor.end(), {float(factor_y), float(factor_x)});
    }
    return inputs;
}

// Each detection of the first image, best first: class, score, and x1, y1, x2, y2 in pixels of the picture.
inline void print(const nlohmann::json& about, const float* box, const float* scores, const std::int32_t* classes,
                  std::int32_t count, float least_score) {
    const std::vector<std::string> names = about.at("classes");
    for (int i = 0; i < count && scores[i] >= least_score; ++i, box += 4)
        std::printf("%s %.4f %.2f %.2f %.2f %.2f\n", names.at(classes[i]).c_str(), scores[i], box[0], box[1], box[2],
                    box[3]);
}
