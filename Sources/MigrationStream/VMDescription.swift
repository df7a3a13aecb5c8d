/// The JSON text behind EOF that gives the sizes of all device sections: what makes a stream readable by programs that do
/// not know the devices (QEMU's `scripts/analyze-migration.py`).
public enum VMDescription {
    /// - Parameter sections: the device sections in the order of the stream, each with its layout.
    public static func json(for sections: [(section: DeviceSection, layout: SectionLayout)]) -> String {
        let devices = sections.map { entry -> String in
            let name = quoted(entry.section.name)
            var fields: [String] = []
            if case .lengthPrefixed = entry.layout { fields.append(field("length", type: "uint32", size: 4)) }
            if !entry.section.body.isEmpty {
                fields.append(field("body", type: "buffer", size: entry.section.body.count))
            }
            return "{\"name\": \(name), \"instance_id\": \(entry.section.instance), \"vmsd_name\": \(name), "
                + "\"version\": \(entry.section.version), \"fields\": [\(fields.joined(separator: ", "))]}"
        }
        return "{\"page_size\": \(Wire.pageSize), \"devices\": [\(devices.joined(separator: ", "))]}"
    }

    private static func field(_ name: String, type: String, size: Int) -> String {
        "{\"name\": \"\(name)\", \"type\": \"\(type)\", \"size\": \(size)}"
    }

    private static func quoted(_ text: String) -> String {
        var result = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"", "\\": result += "\\\(scalar)"
            case "\0"..<" ": result += "\\u" + hexadecimal(UInt64(scalar.value), digits: 4)
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result + "\""
    }
}
