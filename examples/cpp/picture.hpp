// From a PNG or JPEG file to the pixels that a detector was trained with. Needs libpng and libjpeg.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>  // before jpeglib.h, which uses its FILE
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <jpeglib.h>
#include <png.h>

struct Picture {
    int height, width;
    std::vector<std::uint8_t> rgb;  // row by row

    Picture(int height, int width) : height(height), width(width), rgb(std::size_t(3) * height * width) {}
};

inline Picture read_png(const std::string& path) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    if (!png_image_begin_read_from_file(&png, path.c_str())) throw std::runtime_error(path + ": " + png.message);
    png.format = PNG_FORMAT_RGBA;  // to RGB, libpng would blend what is transparent with a background
    std::vector<std::uint8_t> rgba(PNG_IMAGE_SIZE(png));
    if (!png_image_finish_read(&png, nullptr, rgba.data(), 0, nullptr)) throw std::runtime_error(path + ": " + png.message);
    Picture picture(png.height, png.width);
    for (std::size_t i = 0; i < picture.rgb.size(); ++i) picture.rgb[i] = rgba[i / 3 * 4 + i % 3];
    return picture;
}

// Does not turn a picture as its EXIF data say. Where the file is none that it reads, libjpeg says so and exits.
inline Picture read_jpeg(std::FILE* file) {
    jpeg_error_mgr errors;
    jpeg_decompress_struct jpeg;
    jpeg.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&jpeg);
    jpeg_stdio_src(&jpeg, file);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    Picture picture(jpeg.output_height, jpeg.output_width);
    while (jpeg.output_scanline < jpeg.output_height) {
        JSAMPROW row = &picture.rgb[std::size_t(3) * picture.width * jpeg.output_scanline];
        jpeg_read_scanlines(&jpeg, &row, 1);
    }
    jpeg_destroy_decompress(&jpeg);
    return picture;
}

inline Picture read_picture(const std::string& path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) throw std::runtime_error(path + " cannot be opened");
    const int first = std::fgetc(file.get());
    std::rewind(file.get());
    return first == 0xFF ? read_jpeg(file.get()) : read_png(path);
}

struct Place {  // of a resized pixel: between which two of the original it lies, and their weights in 2048ths
    int low, high, low_weight, high_weight;
};

inline std::vector<Place> places(int resized, int original, double factor) {
    std::vector<Place> result;
    for (int i = 0; i < resized; ++i) {
        const float at = float((i + 0.5) * (1 / factor) - 0.5), low = std::floor(at), share = at - low;
        result.push_back({std::clamp(int(low), 0, original - 1), std::clamp(int(low) + 1, 0, original - 1),
                          int(std::lrint((1 - share) * 2048)), int(std::lrint(share * 2048))});
    }
    return result;
}

// Linear interpolation in the integers of OpenCV's INTER_LINEAR, which the detector was trained with: bit for bit.
inline Picture resize(const Picture& picture, double factor_y, double factor_x) {
    Picture resized(int(std::lrint(picture.height * factor_y)), int(std::lrint(picture.width * factor_x)));
    const auto columns = places(resized.width, picture.width, factor_x);
    const auto across = [&](int y) {  // row y of the original, resized
        const std::uint8_t* row = &picture.rgb[std::size_t(3) * picture.width * y];
        std::vector<int> sums;
        for (const Place& x : columns)
            for (int c = 0; c < 3; ++c) sums.push_back(x.low_weight * row[3 * x.low + c] + x.high_weight * row[3 * x.high + c]);
        return sums;
    };
    auto pixel = resized.rgb.begin();
    for (const Place& y : places(resized.height, picture.height, factor_y)) {
        const auto above = across(y.low), below = across(y.high);
        for (std::size_t i = 0; i < above.size(); ++i)
            *pixel++ = ((y.low_weight * (above[i] >> 4) >> 16) + (y.high_weight * (below[i] >> 4) >> 16) + 2) >> 2;
    }
    return resized;
}
